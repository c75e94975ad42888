"""focus_compile in other libraries: one module a library, imported only by those who have it."""
