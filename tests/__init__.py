"""Layered: a lower number explains a higher one."""
