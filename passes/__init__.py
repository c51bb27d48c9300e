"""The stages of the rewrite, one folder each; `attnfuse.fuse.STAGES` says in which order they run."""

if __name__ != "attnfuse.passes":
    raise ImportError("this folder is the package attnfuse.passes; import it by that name")
