"""Students: smaller models that are cut from a teacher, as a start for distillation."""

from hf_slim.student.make import make_student, student_skeleton
from hf_slim.student.shape import StudentShape

__all__ = ["StudentShape", "make_student", "student_skeleton"]
