"""What each stage takes, trains and gives; and the order of them."""
