"""The published methods, one module each."""

from kdkernels.api.methods.label_regularisation import LabelRegulariser
from kdkernels.api.methods.swa import SWA

__all__ = ["SWA", "LabelRegulariser"]
