"""What will fail or is at risk, said before a GPU is billed: `examine` makes every check, `screen` shows them."""
