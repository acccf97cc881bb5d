"""The methods; `point_peft` imports every module and folder here, so that their configurations register themselves.

A folder `point_peft/tuners` anywhere on the path of modules is searched too: a method that somebody else wrote is found
without a line being edited.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
