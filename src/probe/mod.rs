//! Which rungs of the [ladder](crate::ladder) hold between a source and a sink, in every format of the source: tried, not predicted.
//!
//! A rung holds if it joins the two and frames that came that way have been shown. The source is opened anew for each try, so that none
//! depends on the one before.

mod candidates;
mod tries;

use std::os::fd::BorrowedFd;

use crate::endpoint::{Refusal, Rung, Sink, Source};
use crate::error::{Error, Kind, Result};
use crate::format::{Format, Fourcc, Layout};

pub use candidates::{CameraFormats, PatternFormats};
use tries::Bench;

/// One of a source's formats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The format.
    pub format: Format,
    /// How many memory planes its frames lie in.
    pub memory_planes: u32,
    /// The code to ask a camera for; `None` for a source that has none.
    pub code: Option<Fourcc>,
}

impl Offer {
    /// What a person calls it: the format's name, or V4L2's code where that says more (`NM12`: NV12 in two memory planes).
    pub fn name(&self) -> String {
        let usual = self.format.v4l2().next().map(|(_, planes)| planes);
        match self.code {
            Some(code) if usual != Some(self.memory_planes) => code.to_string(),
            _ => self.format.to_string(),
        }
    }
}

/// A source that can be opened in each of its formats.
pub trait Candidate {
    /// What a person calls it.
    fn name(&self) -> &str;

    /// The formats that it has and that are known here.
    ///
    /// # Errors
    /// What the device says.
    fn offers(&self) -> Result<Vec<Offer>>;

    /// The source in this format, not started. The one opened before is closed by then.
    ///
    /// # Errors
    /// As opening the source says.
    fn open(&mut self, offer: &Offer) -> Result<Box<dyn Source>>;
}

/// What a rung does in one format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Frames that came this way were shown.
    Holds(Held),
    /// Why not: one reason, or one for each way that the rung has. Never empty.
    Refused(Vec<Refusal>),
}

impl Outcome {
    /// Whether frames were shown.
    pub fn holds(&self) -> bool {
        matches!(self, Outcome::Holds(_))
    }

    /// What was refused, also on the way to one that holds.
    pub fn refusals(&self) -> &[Refusal] {
        match self {
            Outcome::Holds(held) => &held.refused,
            Outcome::Refused(refusals) => refusals,
        }
    }
}

/// How a rung holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// What the sink was given.
    pub shown: Layout,
    /// Whose memory it was in: the source's, the sink's, an allocator's. `None` for a copier's, which are of whoever made some first.
    pub memory: Option<String>,
    /// What was tried before: other makers of buffers, or the source's own rows.
    pub refused: Vec<Refusal>,
}

/// One format of the source.
#[derive(Debug)]
pub struct Tried {
    /// The format.
    pub offer: Offer,
    /// Whether the sink takes it.
    pub shared: bool,
    /// What the source's frames are like; the error if it does not deliver this format.
    pub source: Result<Layout>,
    /// The rungs in the ladder's order; fewer than all if the probe ended early.
    pub rungs: Vec<(Rung, Outcome)>,
}

/// How a probe ended.
#[derive(Debug)]
pub enum End {
    /// Everything was tried.
    Complete,
    /// It was told to stop.
    Stopped,
    /// Something is broken, whatever the format and the rung.
    Failed(Error),
}

/// What was found between a source and a sink.
#[derive(Debug)]
pub struct Probe {
    /// The source's name.
    pub source: String,
    /// The sink's name.
    pub sink: String,
    /// The formats, those that the sink takes first.
    pub formats: Vec<Tried>,
    /// How it ended.
    pub end: End,
}

/// Tries every rung in every format of the source, with frames that are shown. `progress` is called before each try. It stops between two
/// tries, or while it waits for a frame, when `stop` becomes readable.
///
/// A display goes on showing the last frame; [`restore`](crate::kms::Display::restore) it. A refused rung is a result, and so are the
/// failures that concern one try alone.
///
/// Cost: for each format the source is opened about six times, and two frames are waited for on each rung that joins.
pub fn probe(
    candidate: &mut dyn Candidate,
    sink: &mut dyn Sink,
    stop: Option<BorrowedFd<'_>>,
    progress: &mut dyn FnMut(&Offer, Rung),
) -> Probe {
    let mut found = Probe {
        source: candidate.name().to_owned(),
        sink: sink.name().to_owned(),
        formats: Vec::new(),
        end: End::Complete,
    };
    let taken = sink.formats();
    let takes = |format: Format| taken.as_ref().is_none_or(|taken| taken.contains(&format));
    let mut offers = match candidate.offers() {
        Ok(offers) => offers,
        Err(error) => return Probe { end: End::Failed(error), ..found },
    };
    // In each part in the order of preference.
    let place = |format: Format| Format::all().position(|other| other == format);
    offers.sort_by_key(|offer| (!takes(offer.format), place(offer.format)));
    for offer in offers {
        let mut bench = Bench { candidate: &mut *candidate, sink: &mut *sink, stop, offer };
        let mut tried =
            Tried { offer, shared: takes(offer.format), source: bench.layout(), rungs: Vec::with_capacity(4) };
        match tried.source {
            Ok(_) => {
                if let Err(ended) = each_rung(&mut bench, &mut tried, progress) {
                    found.end = ended;
                }
            }
            // Of one format alone, unless the camera as a whole cannot be had.
            Err(ref error) if matches!(error.kind(), Kind::Unsupported | Kind::Invalid | Kind::System) => {}
            Err(error) => {
                found.end = End::Failed(error);
                return found;
            }
        }
        found.formats.push(tried);
        if !matches!(found.end, End::Complete) {
            break;
        }
    }
    found
}

fn each_rung(bench: &mut Bench<'_>, tried: &mut Tried, progress: &mut dyn FnMut(&Offer, Rung)) -> Result<(), End> {
    for rung in Rung::ALL {
        progress(&bench.offer, rung);
        let exported = tried.rungs.first().and_then(|(_, outcome)| outcome.refusals().first().cloned());
        let outcome = match rung {
            Rung::Exported => bench.exported()?,
            Rung::Reverse => bench.reverse(exported.as_ref())?,
            Rung::Converted => bench.converted()?,
            Rung::Copied => bench.copied()?,
        };
        tried.rungs.push((rung, outcome));
    }
    Ok(())
}
