"""Students: smaller models, made from a teacher, for distillation to start from."""

from hf_slim.student.make import make_student, student_skeleton
from hf_slim.student.shape import StudentShape

__all__ = ["StudentShape", "make_student", "student_skeleton"]
