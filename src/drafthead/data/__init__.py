"""Chats in, token ids and loss mask out; the answers that the target wrote."""
