"""Tests of attnfuse; the folders mirror the two trees."""
