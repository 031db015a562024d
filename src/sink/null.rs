//! `null`: takes frames and lets go of them at once.

use crate::clock::now_us;
use crate::endpoint::{JoinError, Rung, Shown, Sink};
use crate::error::Result;
use crate::fence::SyncFile;
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame};

/// A [`Sink`] that only counts: it takes any format, looks at nothing, and lets each frame go at once. What is left is
/// the cost of the source.
#[derive(Debug, Default)]
pub struct Null {
    frames: u64,
}

impl Null {
    /// A sink that has seen nothing.
    pub fn new() -> Null {
        Null::default()
    }

    /// How many frames it took.
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

impl Sink for Null {
    fn name(&self) -> &str {
        "null"
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    fn join(&mut self, _: &Layout, _: Option<f64>, _: &[Buffer]) -> Result<Rung, JoinError> {
        Ok(Rung::Exported)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        self.frames += 1;
        Ok(Some(Shown { meta: *frame.meta(), at_us: now_us() }))
    }

    /// It looks at no pixel, so it does not matter whether they are there yet.
    fn waits_for<'a>(&'a self, _: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Ready, Source};
    use crate::memory::Allocator;
    use crate::pattern::{Pattern, PatternRequest};

    /// Its frames are those of a source that may not be done with them.
    #[test]
    fn it_waits_for_nothing() {
        let mut source = Pattern::new(&PatternRequest { rate: 1000.0, ..PatternRequest::default() }).unwrap();
        source.start().unwrap();
        let frame = std::iter::from_fn(|| Some(source.try_next(Ready::FRAME).unwrap()))
            .flatten()
            .next()
            .unwrap();
        let (open, _end) = nix::unistd::pipe().unwrap();
        let frame = frame.with_acquire_fence(SyncFile::from(open));
        assert!(Null::new().waits_for(Some(&frame)).is_empty());
        // One that reads does.
        assert_eq!(crate::sink::Png::new("picture.png").waits_for(Some(&frame)).len(), 1);
    }

    #[test]
    fn it_counts_and_keeps_nothing() {
        let request = PatternRequest { rate: 1000.0, allocator: Some(Allocator::Plain), ..PatternRequest::default() };
        let mut source = Pattern::new(&request).unwrap();
        let mut sink = Null::new();
        assert_eq!(sink.join(source.layout(), source.rate(), source.buffers()).unwrap(), Rung::Exported);
        source.start().unwrap();
        while sink.frames() < 10 {
            if let Some(frame) = source.try_next(Ready::FRAME).unwrap() {
                let stamp = frame.meta().timestamp.us;
                assert!(sink.present(frame).unwrap().unwrap().at_us >= stamp);
            }
        }
        assert_eq!((source.slots().dequeued, sink.finish().unwrap(), sink.ledger().bytes()), (0, None, 0));
    }
}
