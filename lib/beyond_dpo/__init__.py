"""Beyond DPO: ExPO, MallowsPO and WRPO reproduced, one claim per notebook."""

__version__ = "0.1.0"
