"""Re-ranking: the shortlist of the networks in a better order, by all that is known of a query and a class.

- `signals`: what is known, one contract each.
- `blend` and `order`: how signals become one score, by strengths or by a small network.
- `model`: the re-ranker of a run as it answers; `record`: what a finished one tells about itself.
- `settings` and `fitting`: how one is made.
"""
