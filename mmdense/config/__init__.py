"""Config files: reading, editing and validating them before anything is built."""
