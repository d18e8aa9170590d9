"""Register the family and run one of the project's programs: `python with_bag_of_words.py MODULE ARGUMENTS`."""

import runpy
import sys

from pipeline.models.registry import FAMILIES

FAMILIES.register("bag_of_words", "bag_of_words")
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
