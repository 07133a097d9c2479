"""Weight files: reading, writing, converting, and the demo model."""
