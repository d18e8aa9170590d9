from pipeline import interrupt

interrupt.while_importing()  # which takes seconds
