class EngineArgs:
    def __init__(self, **said):
        self.said = said
