"""Experts, gateways and users on the nodes of a Ray cluster."""
