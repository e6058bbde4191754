"""The signals of a re-ranker: what is known of a query and a class. Their list is in `mach.reranking.signals.list`."""
