"""What is left of safety when somebody tries: a white-box attacker, and the pictures it gets."""
