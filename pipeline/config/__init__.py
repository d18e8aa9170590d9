"""A recipe: what one run trains, on what, and how. Typed, validated, with `key=value` overrides.

A recipe is a YAML file (see `pipeline/recipes/`). Every value of it can be set on the command line
by its dotted name: `optimizer.lr=2e-5 data.url=s3://bucket/prefix`. An unknown name, a wrong type or
values that cannot work together are errors that name the field, before anything is started.

What a model or an objective needs of a recipe is declared in its own folder: see `ModelSection` and `ObjectiveSection`.
"""

from pipeline.config.data import Data as Data
from pipeline.config.data import Part as Part
from pipeline.config.encoding import Encoding as Encoding
from pipeline.config.encoding import EvaluatedVideo as EvaluatedVideo
from pipeline.config.encoding import EvaluationRun as EvaluationRun
from pipeline.config.load import ROOT as ROOT
from pipeline.config.load import dump_recipe as dump_recipe
from pipeline.config.load import is_offloaded as is_offloaded
from pipeline.config.load import load_ds_config as load_ds_config
from pipeline.config.load import load_recipe as load_recipe
from pipeline.config.load import parse_options as parse_options
from pipeline.config.load import recipe_of_run as recipe_of_run
from pipeline.config.mining import MiningRun as MiningRun
from pipeline.config.recipe import Batch as Batch
from pipeline.config.recipe import LanguageModelTrain as LanguageModelTrain
from pipeline.config.recipe import Lora as Lora
from pipeline.config.recipe import ModelSection as ModelSection
from pipeline.config.recipe import ObjectiveSection as ObjectiveSection
from pipeline.config.recipe import Optimizer as Optimizer
from pipeline.config.recipe import Prefixes as Prefixes
from pipeline.config.recipe import Recipe as Recipe
from pipeline.config.recipe import TrainSection as TrainSection
from pipeline.config.section import Fixed as Fixed
from pipeline.config.section import Section as Section
