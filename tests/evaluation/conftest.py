"""Small models of the exported form."""

from nld_train.testing.exports import make_model, quiet_and_single_threaded, write_export

__all__ = ["make_model", "quiet_and_single_threaded", "write_export"]
