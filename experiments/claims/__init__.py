"""Claims of the papers, a file each: ``NNN_name.py`` measures one, ``NNN_name.json`` is its recorded result."""
