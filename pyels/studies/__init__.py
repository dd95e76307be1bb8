"""What is measured with machines and networks, and how results are kept and drawn."""
