"""Side-by-side measurements with other packages. None is installed from here; each script says how to get its peer."""
