"""The published methods, one module each."""

from kdkernels.api.methods.alignment import AlignedLayers, Alignment
from kdkernels.api.methods.diito import DIITO, DIITOParts
from kdkernels.api.methods.expertise import expertise_weights
from kdkernels.api.methods.label_regularisation import LabelRegulariser
from kdkernels.api.methods.meta_kd import MetaKD, MetaKDParts
from kdkernels.api.methods.meta_teacher import MetaTeacher, MetaTeacherParts
from kdkernels.api.methods.spans import masked_positions, sample_positions, sample_spans
from kdkernels.api.methods.stark import SparseTeacher
from kdkernels.api.methods.swa import SWA
from kdkernels.api.methods.teacher_scores import TeacherScores

__all__ = [
    "DIITO",
    "SWA",
    "AlignedLayers",
    "Alignment",
    "DIITOParts",
    "LabelRegulariser",
    "MetaKD",
    "MetaKDParts",
    "MetaTeacher",
    "MetaTeacherParts",
    "SparseTeacher",
    "TeacherScores",
    "expertise_weights",
    "masked_positions",
    "sample_positions",
    "sample_spans",
]
