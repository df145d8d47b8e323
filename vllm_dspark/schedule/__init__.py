"""What is verified and how much is drafted, each step (paper, 3.2.2, 4.3.3, 5.2).

Numpy only: none of it sees a model, a tensor or a server.
"""
