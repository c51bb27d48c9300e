"""The stages of the rewrite, in the order they run: lift, simplify, certify, lower, tidy."""

if __name__ != "attnfuse.passes":
    raise ImportError("this folder is the package attnfuse.passes; import it by that name")
