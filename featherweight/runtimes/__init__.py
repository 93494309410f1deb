"""Runtimes: the engines that serve variants, each measured in a process of its own."""
