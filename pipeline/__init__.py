from pipeline import home, interrupt

interrupt.while_importing()  # which takes seconds
home.replace_if_unwritable()  # before others are imported, which look at once
