"""What the commands have in common; each module says what it holds."""
