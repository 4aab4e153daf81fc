"""Compute the package list: a hand-kept one would drop a new subpackage from the wheel unseen."""

from setuptools import find_packages, setup

FOLDERS = {"prerank_cli": "cli", "prerank_schemas": "schemas", "prerank_sample_data": "sample_data"}

setup(
    packages=[*FOLDERS, *find_packages(include=["prerank_tools", "prerank_tools.*"])],
    package_dir={**FOLDERS, "prerank_tools": "prerank_tools"},
)
