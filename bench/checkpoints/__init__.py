"""Checkpoints: safe reading, unwrapping, the families of layouts, and the contract of coverage.

files, pickles    open a file without running code from it
family            what a family declares; the search for encoders in a file
loading           the contract of coverage: everything filled, everything accounted for
native            this project's own format
plain_vit         what shapes say of a plain vision transformer
families          one layout a file
"""

from ..vit import build_vit, vit_spec
from .files import open_checkpoint
from .loading import load_file
from .native import save_checkpoint

__all__ = ["build_vit", "load_file", "open_checkpoint", "save_checkpoint", "vit_spec"]
