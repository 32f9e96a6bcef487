"""tmp"""
import own_modules  # noqa
from errors import UserError  # noqa
import training.loaded_run  # noqa
