"""Students: smaller models that are cut out of a teacher, to start a distillation from."""

from hf_slim.student.make import make_student, student_skeleton
from hf_slim.student.shape import StudentShape

__all__ = ["StudentShape", "make_student", "student_skeleton"]
