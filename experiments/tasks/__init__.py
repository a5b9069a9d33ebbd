"""Tasks: generators of synthetic problems and the experiments that train on them."""
