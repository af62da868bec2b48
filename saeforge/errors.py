"""The errors that saeforge shows to people.

Every message is one line that says what was given, what was expected and what to do. The command line prints it as
`saeforge: error: <message>` and exits with code 2; a traceback is shown only for a defect of saeforge itself.
"""

from __future__ import annotations


class SaeforgeError(Exception):
    """Base of all errors with a cause that the user can mend."""


class ConfigError(SaeforgeError):
    """An option, a configuration file or an argument of a Python call is wrong."""


class PluginError(SaeforgeError):
    """A plugin is unknown, broken, incompatible, or two distributions claim its name."""


class DatasetError(SaeforgeError):
    """An activation dataset is missing, damaged, of another version, or does not fit the request."""


class CheckpointError(SaeforgeError):
    """A checkpoint or a saved SAE is missing, damaged, or belongs to another configuration."""
