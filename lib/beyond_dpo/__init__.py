"""Beyond DPO: ExPO, MallowsPO and WRPO reproduced, one claim per notebook."""

__version__ = "1.0.0"
