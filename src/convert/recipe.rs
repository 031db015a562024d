//! Which way leads from one format to another.

use crate::format::{Format, Kind, Layout};

use super::rgb::{Decode, Encode};
use super::yuv::{Matrix, Take};

/// The steps of a conversion.
#[derive(Debug)]
pub(super) enum Recipe {
    /// The same format: bytes as they are.
    Same,
    /// RGB to RGB.
    Rgb(Decode, Encode),
    /// Grey to RGB.
    Grey(Encode),
    /// YUV to RGB.
    Colours(Take, Matrix, Encode),
    /// YUV samples in another order: how they lie, and how they are to lie.
    Samples(Take, Take),
}

impl Recipe {
    /// The way from one format to another, for the default encoding and range; `None` if there is none.
    pub(super) fn find(from: Format, to: Format) -> Option<Recipe> {
        if from == to {
            return Some(Recipe::Same);
        }
        match (from.kind(), to.kind()) {
            (Kind::Rgb { .. }, Kind::Rgb { .. }) => {
                let encode = Encode::of(to)?;
                Some(Recipe::Rgb(Decode::of(from, encode.red_first())?, encode))
            }
            (Kind::Grey, Kind::Rgb { .. }) => Some(Recipe::Grey(Encode::of(to)?)),
            (_, Kind::Rgb { .. }) => Some(Recipe::Colours(Take::of(from)?, Matrix::default(), Encode::of(to)?)),
            _ => {
                let (take, give) = (Take::of(from)?, Take::of(to)?);
                // Neither gains nor loses a sample or a bit.
                let alike = from.subsampling() == to.subsampling() && !take.is_wide() && !give.is_wide();
                alike.then_some(Recipe::Samples(take, give))
            }
        }
    }

    /// The same with the source's encoding and range.
    pub(super) fn with_colour(self, from: &Layout) -> Recipe {
        match self {
            Recipe::Colours(take, _, encode) => {
                Recipe::Colours(take, Matrix::new(from.colour(), take.is_wide(), encode.red_first()), encode)
            }
            other => other,
        }
    }
}
