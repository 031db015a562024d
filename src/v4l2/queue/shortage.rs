//! What a queue does when views of its frames keep so many buffers that the driver would starve.

use super::*;
use crate::ledger::Copies;

impl<S> Queue<S> {
    /// Sets what happens when views of frames keep so many buffers that the driver has fewer than it needs; [`ViewPolicy::Detach`]
    /// at first. Buffers without views are queued before any view is touched.
    pub fn set_view_policy(&mut self, policy: ViewPolicy) {
        self.view_policy = policy;
    }
}

impl Queue<Allocated> {
    pub(in crate::v4l2) fn slots(&self) -> &Slots {
        &self.state.0.slots
    }
}

impl Queue<Streaming> {
    pub(in crate::v4l2) fn slots(&self) -> &Slots {
        &self.state.0.slots
    }

    /// Who has views of its frames now, the oldest first. No system call, no lock.
    pub fn views(&self) -> Vec<ViewInfo> {
        self.state.0.slots.views().infos()
    }

    /// What was copied for views of its frames since its buffers were made: pages written, views detached, snapshots.
    pub fn view_copies(&self) -> Vec<Copies> {
        self.state.0.slots.views().copies()
    }

    /// All free slots are queued, and there are views: sees to it that the driver has enough.
    pub(super) fn relieve(&self) -> Result<()> {
        while self.state.0.slots.queued() < self.state.0.least_queued {
            match self.view_policy {
                ViewPolicy::Wait => break,
                ViewPolicy::Error if self.state.0.slots.queued() == 0 => return Err(self.held()),
                ViewPolicy::Error => break,
                // Where a holder is writing, or a frame is held besides the views, nothing can be had: the next call tries again.
                ViewPolicy::Detach if !self.state.0.slots.detach_oldest_view() => break,
                ViewPolicy::Detach => self.queue_free()?,
            }
        }
        Ok(())
    }

    /// The driver has just given one up: if that leaves it with too few, it should not have to wait for the next call.
    pub(super) fn relieve_at_once(&self) {
        if self.view_policy == ViewPolicy::Detach && !self.state.0.slots.views().is_empty() {
            // A slot that could not be queued stays free; the next call tries again and reports it.
            let _ = self.relieve();
        }
    }

    fn held(&self) -> Error {
        let error = Error::new(Kind::Busy, "fill a buffer of", self.name());
        error
            .because(format!("it has none: {}{}", self.counts(), held_by(&self.views())))
            .repair("drop views sooner, let the queue detach them, or ask for more buffers")
    }
}

/// `; views: slot 0 by …, slot 1 by …`, or nothing.
pub(in crate::v4l2) fn held_by(views: &[ViewInfo]) -> String {
    let views: Vec<_> = views.iter().map(ToString::to_string).collect();
    if views.is_empty() { String::new() } else { format!("; views of {}", views.join(", ")) }
}
