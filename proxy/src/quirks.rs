//! Work-arounds for known Pingora 0.9.1 bugs, one function or type each. When Pingora mends one, its test in
//! `tests/quirks.rs` passes without the work-around, which can then go.
//!
//! Two more are kept by never doing the thing: `HttpPeer::new` is only ever given a socket address (it resolves names
//! blockingly and panics on failure, issues 570 and 921), and the request body is never read before the instance is
//! connected (beyond 64 KiB it would be lost silently, issues 349, 575 and 816).

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Issue 935: an HTTP/2 request body that ends in an empty DATA frame becomes two chunk terminators upstream, which poisons the
/// kept-alive connection. An empty last piece is the same as none.
pub fn drop_empty_last_chunk(body: &mut Option<Bytes>, end_of_stream: bool) {
    if end_of_stream && body.as_ref().is_some_and(Bytes::is_empty) {
        *body = None;
    }
}

/// Issue 946: when the instance's `101 Switching Protocols` is read before the proxy has taken note of the end of the request's own (empty)
/// body, the tunnel is closed right after it. Used for the connections of upgrade requests only: the first read
/// waits for one more turn of the task, in which the end of the body is processed first.
pub struct YieldBeforeRead {
    socket: TcpStream,
    yielded: bool,
}

impl YieldBeforeRead {
    /// Wraps a connected socket.
    #[must_use]
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, yielded: false }
    }
}

impl fmt::Debug for YieldBeforeRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

impl AsyncRead for YieldBeforeRead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.yielded {
            self.yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for YieldBeforeRead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl VirtualSocket for YieldBeforeRead {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.socket.set_nodelay(true),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_empty_last_piece_of_a_body_is_dropped() {
        let mut body = Some(Bytes::new());
        drop_empty_last_chunk(&mut body, true);
        assert_eq!(body, None);
        let mut body = Some(Bytes::new());
        drop_empty_last_chunk(&mut body, false);
        assert_eq!(body, Some(Bytes::new()));
        let mut body = Some(Bytes::from_static(b"x"));
        drop_empty_last_chunk(&mut body, true);
        assert_eq!(body, Some(Bytes::from_static(b"x")));
    }
}
