"""A package, since a library that others need installs one of this name too."""
