"""What the adapters of all serving engines share. Knows no engine."""
