"""What is known of a query and a class: a file a signal, `contract` what all keep to, `roster` the list of them."""
