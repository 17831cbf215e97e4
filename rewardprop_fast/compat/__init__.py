"""Drop-in replacements for other libraries' interfaces, running on this one."""
