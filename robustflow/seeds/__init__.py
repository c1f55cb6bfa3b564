"""Several seeds of one config, OUT/seed-N: the stages for all of them, and a report over them."""
