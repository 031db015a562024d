//! What a receiver hears from its server: buffers, fences, the end.

use super::*;
use crate::frame::MAX_SLOTS;
use crate::share::fences::sync_file;
use crate::share::incoming::{COMING, learn};
use crate::share::ring::ENTRIES;
use crate::share::socket::Received;
use crate::share::wire::Message;

/// So many messages at once are more than a server has to say: of more generations than are kept none is of use, and fences of those who do
/// not read them are some 16.
const MOST: usize = COMING * (MAX_SLOTS as usize + 1) + 16 * ENTRIES;

impl Receiver {
    /// Reads what the socket has. Once the server has ended there is nothing more.
    pub(in super::super) fn hear(&mut self) {
        for heard in 0.. {
            if self.end.is_some() {
                return;
            }
            if heard >= MOST {
                self.end = Some(End::Nonsense("it sends messages without an end".to_owned()));
                return;
            }
            match self.server.socket.receive(true) {
                Ok(Received::Nothing) => return,
                Ok(Received::Closed) => self.end = Some(End::HungUp),
                Ok(Received::Message(Message::End { reason, text }, _)) => self.end = Some(End::Said(reason, text)),
                Ok(Received::Message(Message::Fence { position }, fds)) => {
                    let added = sync_file(fds).and_then(|fence| self.server.fences.add(position, fence));
                    if let Err(why) = added {
                        self.end = Some(End::Nonsense(why));
                    }
                }
                Ok(Received::Message(message, fds)) => {
                    if let Err(why) = learn(&mut self.server.coming, message, fds) {
                        self.end = Some(End::Nonsense(why));
                    }
                }
                Err(rejected) => self.end = Some(End::Nonsense(rejected.to_string())),
            }
        }
    }

    /// The acquire fence of a frame that was taken, if it has one: it was sent before. Those of frames before are closed.
    #[cold]
    pub(super) fn find_fence(&mut self, position: u64, fenced: bool) -> Result<()> {
        self.fence = self.server.fences.take(position);
        if fenced && self.fence.is_none() {
            self.hear();
            self.fence = self.server.fences.take(position);
        }
        if fenced == self.fence.is_some() {
            return Ok(());
        }
        let gone = Error::new(Kind::Disconnected, "read frames from", self.name.clone());
        let why = match &self.end {
            Some(End::Nonsense(why)) => why,
            _ if fenced => "the fence of a frame has not come",
            _ => "a fence is of a frame that has none",
        };
        Err(gone.because(format!("its server breaks the protocol: {why}")))
    }

    /// Gives a frame back that cannot be shown: it is of buffers that were let go of for newer ones.
    pub(super) fn pass_over(&mut self, taken: Taken) -> Result<()> {
        self.fence = None;
        self.lost.passed_over();
        match self.server.area.release(taken.position) {
            Ok(true) => self.server.bell.ring().context("wake", || self.name.as_str()),
            Ok(false) | Err(Revoked) => Ok(()),
        }
    }
}
