//! `--keep-views`: a consumer that keeps what it has seen, to try what the camera does about it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use dmaflow::endpoint::{JoinError, Rung, Shown, Sink, Verdict};
use dmaflow::error::Result;
use dmaflow::fence::{FenceUse, SyncFile};
use dmaflow::format::{Format, Layout};
use dmaflow::frame::{Buffer, CowView, Frame, Room};
use dmaflow::ledger::Ledger;

/// Another sink, and copy-on-write views of the newest frames that went there.
pub struct Keeper<'a> {
    inner: &'a mut dyn Sink,
    views: VecDeque<CowView>,
    most: usize,
}

impl<'a> Keeper<'a> {
    pub fn new(inner: &'a mut dyn Sink, most: u32) -> Keeper<'a> {
        let most = most as usize;
        Keeper { inner, views: VecDeque::with_capacity(most + 1), most }
    }
}

impl Sink for Keeper<'_> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn formats(&self) -> Option<Vec<Format>> {
        self.inner.formats()
    }

    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        self.inner.join(layout, rate, buffers)
    }

    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        self.inner.allocate(layout, room, count)
    }

    fn card_node(&self) -> Option<&Path> {
        self.inner.card_node()
    }

    fn gpu_name(&self) -> Option<&str> {
        self.inner.gpu_name()
    }

    fn inspect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        self.inner.inspect(frame, place)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        self.views.push_back(frame.view("dmaflow --keep-views")?);
        if self.views.len() > self.most {
            self.views.pop_front();
        }
        self.inner.present(frame)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn wants_event(&self) -> bool {
        self.inner.wants_event()
    }

    fn acquire_fences(&self) -> Vec<BorrowedFd<'_>> {
        self.inner.acquire_fences()
    }

    fn untold(&mut self) -> Option<dmaflow::error::Error> {
        self.inner.untold()
    }

    fn acquire_time_left(&self) -> Option<Duration> {
        self.inner.acquire_time_left()
    }

    fn waits_for<'a>(&'a self, next: Option<&'a Frame>) -> Vec<&'a SyncFile> {
        // To make a view is to wait, as the CPU reads.
        let own = next.and_then(Frame::acquire_fence);
        let inner = self.inner.waits_for(next).into_iter();
        inner
            .filter(|fence| own.is_none_or(|own| !std::ptr::eq(*fence, own)))
            .chain(own)
            .collect()
    }

    fn fence_timeout(&self) -> Duration {
        self.inner.fence_timeout()
    }

    fn give_up(&mut self) {
        self.inner.give_up();
    }

    fn fence_use(&self) -> FenceUse {
        self.inner.fence_use()
    }

    fn dispatch(&mut self) -> Result<Option<Shown>> {
        self.inner.dispatch()
    }

    fn finish(&mut self) -> Result<Option<Shown>> {
        self.inner.finish()
    }

    fn hold(&mut self) -> Result<()> {
        self.inner.hold()
    }

    fn news(&mut self) -> Option<String> {
        self.inner.news()
    }

    fn dropped(&self) -> u64 {
        self.inner.dropped()
    }

    fn imports(&self) -> u64 {
        self.inner.imports()
    }

    fn ledger(&self) -> &Ledger {
        self.inner.ledger()
    }

    fn verdict(&self) -> Option<Verdict> {
        self.inner.verdict()
    }
}
