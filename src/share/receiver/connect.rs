//! How a receiver comes to its server, and waits for that.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::share::join::{ANSWER, Joining, Wish};

/// Joins a server, and waits for it.
fn join(hello: &Hello) -> Result<Joined> {
    let mut joining = begin(hello)?;
    loop {
        match joining.step() {
            Ok(true) => return joining.joined(),
            Ok(false) => {}
            Err(error) if joining.may_read_instead(&error) => joining = begin(&hello.for_reading())?,
            Err(error) => return Err(error),
        }
        let left = joining.until_us().saturating_sub(now_us()).div_ceil(1000);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(joining.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("wait for", || hello.place.to_string()),
        }
    }
}

/// Connects, and waits for that where many do so.
fn begin(hello: &Hello) -> Result<Joining> {
    let until = now_us().saturating_add(hello.answer_us());
    loop {
        match Joining::begin(hello) {
            // More want to connect at the moment than the server has let in.
            Err(error) if error.kind() == Kind::Busy && now_us() < until => {
                std::thread::sleep(Duration::from_millis(10))
            }
            other => return other,
        }
    }
}

impl Receiver {
    /// Connects to the server at `place` (a path, or `@name`), and gets its buffers. `name` is what this process calls itself there. Waits
    /// for five seconds at most.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if nobody shares anything there; [`Kind::Permission`] if the server refuses; [`Kind::Busy`] if it has no place at
    /// the moment; [`Kind::Timeout`];
    /// [`Kind::Invalid`] if it does not speak the protocol.
    pub fn connect(place: &str, name: &str) -> Result<Receiver> {
        Receiver::wishing(place, name, Wish::Read, ANSWER)
    }

    /// The same, waiting for `time` at most.
    ///
    /// # Errors
    /// As [`Receiver::connect`].
    pub fn connect_within(place: &str, name: &str, time: Duration) -> Result<Receiver> {
        Receiver::wishing(place, name, Wish::Read, time)
    }

    /// The same for one that must write into the buffers, which most servers do not allow.
    ///
    /// # Errors
    /// As [`Receiver::connect`]; [`Kind::Permission`] also where the buffers are shared for reading alone.
    pub fn connect_writable(place: &str, name: &str) -> Result<Receiver> {
        Receiver::wishing(place, name, Wish::Write, ANSWER)
    }

    /// The same for one that would write into the buffers where the server lets it, and reads them where not: for devices of which it is not
    /// known whether they can import what is for reading alone. Each server that it [comes back to](Receiver::come_back_to_it) is asked
    /// anew. Whether it may write, [`Buffer::write`] tells. A server that refuses is asked a second time, and may take as long for that.
    ///
    /// # Errors
    /// As [`Receiver::connect`].
    pub fn connect_writable_if_allowed(place: &str, name: &str) -> Result<Receiver> {
        Receiver::wishing(place, name, Wish::WriteIfItMay, ANSWER)
    }

    fn wishing(place: &str, name: &str, wish: Wish, answer: Duration) -> Result<Receiver> {
        let hello = Hello { place: Place::parse(place), name: name.to_owned(), wish, answer };
        let server = join(&hello)?;
        Receiver::of(hello, server)
    }
}
