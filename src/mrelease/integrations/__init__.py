"""Hooks for software that kills: each module is loaded only by who asks for it."""
