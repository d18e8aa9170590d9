from pipeline import home

home.replace_if_unwritable()  # before others are imported, which look at once
