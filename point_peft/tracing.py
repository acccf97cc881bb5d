from point_peft.errors import AnatomyError
def trace(model, args, kwargs):
    raise AnatomyError("not yet")
