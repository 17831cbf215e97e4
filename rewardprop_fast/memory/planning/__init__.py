"""What a plan is made of: limits, variables, bytes in every interval, the integer program."""
